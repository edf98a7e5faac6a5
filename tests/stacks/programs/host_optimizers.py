"""Optimizers on the host in the loops of Trainer, Accelerate and Lightning: what torch's learn."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

from _program import assert_close, assert_learns, main

# isort: split
import accelerate_loop
import lightning_fit
import transformers_trainer

from spillover.optim import Adagrad, AdamW, Lion

NEEDS = ("transformers", "accelerate", "lightning")

#: Options of each way to keep state, and classes that tools meet differently.
WAYS: list[tuple[Any, dict[str, Any]]] = [
    (AdamW, {}),
    (AdamW, {"offload_gradients": True, "moments": "blockwise8"}),
    (Lion, {"offload_gradients": True}),
    (Adagrad, {"moments": "bfloat16"}),
]


def run() -> None:
    """Each class in each loop; Trainer and Lightning also resume in the middle."""
    expected = accelerate_loop.train(cpu=False)
    expected_fit, _ = lightning_fit.fit("gpu")
    for make, options in WAYS:
        is_adamw = make is AdamW
        losses = accelerate_loop.train(cpu=False, make=functools.partial(make, **options))
        assert_learns(losses)
        if is_adamw:
            assert_close(losses, expected, tolerance=0.02)

        made = functools.partial(make, **options)
        fitted, _ = lightning_fit.fit("gpu", made)
        if is_adamw:
            assert_close(fitted, expected_fit, tolerance=0.02)
        # The last of three epochs, from a checkpoint of the second.
        resumed, _ = lightning_fit.fit("gpu", made, resume=True)
        assert_close(resumed, fitted[-len(resumed) :], tolerance=1e-3)

        with tempfile.TemporaryDirectory() as folder:
            optimizer = (make, {"lr": 5e-3 if make is not Lion else 1e-3, **options})
            trained = transformers_trainer.train(folder, use_cpu=False, optimizer=optimizer)
            assert_learns(trained)
            again = transformers_trainer.train(
                folder, use_cpu=False, optimizer=optimizer, resume=True
            )
            assert_close(again, trained, tolerance=1e-3)
    scaled, _ = lightning_fit.fit(
        "gpu", functools.partial(AdamW, offload_gradients=True), precision="16-mixed"
    )
    assert_close(scaled, expected_fit, tolerance=0.05)


if __name__ == "__main__":
    main(run, needs=NEEDS)
