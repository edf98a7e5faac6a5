// Scratch files for file systems without O_TMPFILE (NFS, some overlays and FUSE): made under a name
// that is taken away before the file is used.
//
// Note [Abandoned scratch]. A process that is killed between the two leaves its file behind, so who
// opens a store in the folder later removes it. Process ids say nothing about whose it is: they lie
// across containers and network file systems. What may be removed is known by all of these:
//   - its name, kPrefix, 16 random hexadecimal digits and 8 that check those: no other program
//   makes
//     such a name by chance;
//   - it is an empty regular file with that one name. Scratch has no byte while it has a
//     name, so nothing that anybody has stored can ever be lost;
//   - its lock (flock) is free. Its maker takes that first of all and holds it until the file has
//   no
//     name; the kernel frees it when the maker ends, on network file systems of other machines too.
// A maker whose file was found before it had the lock sees that the name is gone and begins again.
// Where files cannot be locked nothing is ever removed.
//
// A network file system may keep an unlinked file under a name of its own (.nfs*) while it is open,
// and removes it when the process ends; where the whole machine stops, that is left to its server.
//
// Thread-safe; folder is the descriptor of one. PRIVATE to tiers/.
#pragma once

#include <cstddef>

namespace spillover {

inline constexpr const char* kScratchPrefix = ".spillover-scratch-";

// A new file, mode 0600, with no name any more; below zero with errno set where it cannot be had.
// flags as for open(), besides those for making it.
int open_named_scratch(int folder, int flags);

// Removes what killed processes have left. Its count; what cannot be looked at is passed over.
size_t remove_abandoned_scratch(int folder) noexcept;

}  // namespace spillover
