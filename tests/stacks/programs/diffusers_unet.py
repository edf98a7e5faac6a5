"""A conditioned U-Net of diffusers: training steps, and a denoising loop in bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING

from _program import assert_close, assert_learns, main

# isort: split
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

NEEDS = ("diffusers",)


def new_unet() -> UNet2DConditionModel:
    """The same weights at each call."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=8,
        norm_num_groups=8,
    )


def train(device: str) -> list[float]:
    """Losses of learning to predict the noise in one batch."""
    from diffusers import DDPMScheduler

    model = new_unet().to(device)
    scheduler = DDPMScheduler(num_train_timesteps=100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(1)
    images, noise = (torch.randn(4, 4, 8, 8, generator=generator).to(device) for _ in range(2))
    text = torch.randn(4, 5, 16, generator=generator).to(device)
    steps = torch.tensor([10, 40, 70, 99]).to(device)
    noisy = scheduler.add_noise(images, noise, steps)
    losses = []
    for _ in range(4):
        loss = F.mse_loss(model(noisy, steps, encoder_hidden_states=text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def denoise(device: str) -> torch.Tensor:
    """The image after four steps."""
    from diffusers import DDIMScheduler

    model = new_unet().to(device, torch.bfloat16)
    scheduler = DDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(4, device=device)
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(2, 4, 8, 8, generator=generator).to(device, torch.bfloat16)
    text = torch.randn(2, 5, 16, generator=generator).to(device, torch.bfloat16)
    for step in scheduler.timesteps:
        predicted = model(image, step, encoder_hidden_states=text).sample
        image = scheduler.step(predicted, step, image).prev_sample
    return image.float().cpu()


def run() -> None:
    """Compare both with the CPU."""
    losses = train("cuda")
    assert_learns(losses)
    assert_close(losses, train("cpu"), tolerance=1e-3)
    assert torch.allclose(denoise("cuda"), denoise("cpu"), atol=0.2)


if __name__ == "__main__":
    main(run, needs=NEEDS)
