// The threads that optimizer kernels share.
//
// Thread-safe. A call blocks until its work is done; the calling thread works too, so that a call
// never waits for threads that are busy with another one. Idle threads sleep. They are started when
// first needed, live as long as the process (nothing joins them at its end) and take no signals. A
// forked child starts its own.
//
// Note [Shares]
// Chunks are divided into as many shares of neighbours as there are threads. A thread begins with
// its own share and then takes from others', so a thread that is slow or busy elsewhere holds
// nobody up, and otherwise each thread meets the same part of the same arrays in every step. Where
// the process may run on several NUMA nodes each thread is bound to the processors of one, in the
// order of shares: memory that was first written by touch_pages lies on the node of those who will
// use it.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace spillover {

// Runs body(context, chunk) for each chunk below chunk_count, on at most `threads` threads, the
// calling one included; 0: as set_optimizer_threads said. body must not throw.
void run_chunks(size_t chunk_count, int threads, void* context,
                void (*body)(void* context, size_t chunk));

// The most threads that calls use by default: at first as many as there are processors in the
// process's affinity mask. 0 asks for that again. Throws ConfigError for numbers below 0.
void set_optimizer_threads(int threads);
int optimizer_threads() noexcept;

// Writes a zero to each page of memory that nobody has written so far, by the threads that will
// work on it when it is one of the arrays of a step. What was there is lost.
void touch_pages(void* address, size_t size_bytes, int threads);

// Processors that the calling thread may run on, by NUMA node, nodes without one left out. root
// stands before /sys: a test gives a folder of its own.
std::vector<std::vector<int>> processors_by_node(const std::string& root = "");

}  // namespace spillover
