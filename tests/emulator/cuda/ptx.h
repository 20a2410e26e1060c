// In place of csrc/cuda/ptx.h: the same functions in C++, with the alignment that the instructions
// ask for checked, and that a block whose shared memory is read has not ended. Not shown: the text
// of the real file, and cache hints.
#pragma once

#include <cmath>
#include <cstring>
#include <string>

#include "language.h"

namespace warpo::cuda {

inline void check_alignment(const void* address, size_t bytes) {
    const auto past = reinterpret_cast<uintptr_t>(address) % bytes;
    if (past != 0) {
        emulator::fail(std::to_string(bytes) + "-byte access " + std::to_string(past) +
                       " bytes past a boundary");
    }
}

inline uint4 load_read_only(const void* address) {
    uint4 v;
    check_alignment(address, sizeof v);
    memcpy(&v, address, sizeof v);
    return v;
}

inline uint4 load_once(const void* address) { return load_read_only(address); }

template <typename Vector>
void store_streaming(void* address, Vector v) {
    check_alignment(address, sizeof v);
    memcpy(address, &v, sizeof v);
}

inline void compute_anew(int64_t&) {}

inline uint32_t shift_bytes(uint32_t low, uint32_t high, int bytes) {
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<uint32_t>(both >> (8 * bytes));
}

inline int rank_in_cluster() { return emulator::current / emulator::block_threads; }

inline void* dynamic_shared() { return emulator::shared_memory[rank_in_cluster()]; }

inline void copy_async(void* shared, const void* global) {
    check_alignment(shared, 16);
    check_alignment(global, 16);
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    fiber.copies.push_back({shared, global, fiber.groups});
}

inline void commit_copies() { ++emulator::fibers[emulator::current].groups; }

template <int kGroups>
void wait_copies() {
    emulator::Fiber& fiber = emulator::fibers[emulator::current];
    const auto waits = [&](const emulator::Copy& copy) {
        return copy.group + kGroups >= fiber.groups;
    };
    for (const emulator::Copy& copy : fiber.copies) {
        if (!waits(copy)) memcpy(copy.to, copy.from, 16);
    }
    const auto first = std::find_if(fiber.copies.begin(), fiber.copies.end(), waits);
    fiber.copies.erase(fiber.copies.begin(), first);
}

inline void cluster_arrive_relaxed() { ++emulator::fibers[emulator::current].arrivals; }

inline void cluster_arrive() { ++emulator::fibers[emulator::current].arrivals; }

inline void cluster_wait() { emulator::wait_as(emulator::kAtClusterBarrier); }

inline float load_from_block(const float* own, int block) {
    const int threads = emulator::block_threads;
    if (emulator::count(block * threads, threads, emulator::kDone) > 0) {
        emulator::fail("reads the shared memory of block " + std::to_string(block) +
                       " of the cluster, which has ended");
    }
    const char* place = reinterpret_cast<const char*>(own);
    float value;
    memcpy(&value, place - emulator::shared_memory[rank_in_cluster()] + emulator::shared_memory[block],
           sizeof value);
    return value;
}

template <typename Value>
Value as_pair(uint32_t word) {
    Value value;
    memcpy(&value, &word, sizeof word);
    return value;
}

template <typename Value>
uint32_t as_word(Value value) {
    uint32_t word;
    memcpy(&word, &value, sizeof word);
    return word;
}

inline float float_from_bf16(uint32_t bits) { return as_pair<float>(bits << 16); }

inline float float_from_f16(uint32_t bits) {
    const uint16_t half = static_cast<uint16_t>(bits);
    _Float16 value;
    memcpy(&value, &half, sizeof half);
    return static_cast<float>(value);
}

// To the nearest, ties to even.
inline uint32_t bf16_from_float(float value) {
    if (std::isnan(value)) return 0x7fff;
    const uint32_t word = as_word(value);
    return (word + 0x7fff + (word >> 16 & 1)) >> 16;
}

inline uint32_t f16_from_float(float value) {
    const _Float16 half = static_cast<_Float16>(value);
    uint16_t bits;
    memcpy(&bits, &half, sizeof bits);
    return bits;
}

inline uint32_t pack_bf16x2(float low, float high) {
    return bf16_from_float(low) | bf16_from_float(high) << 16;
}

inline uint32_t pack_f16x2(float low, float high) {
    return f16_from_float(low) | f16_from_float(high) << 16;
}

inline float2 unpack_f16x2(uint32_t word) {
    return {float_from_f16(word & 0xffff), float_from_f16(word >> 16)};
}

// Of a NaN and a number, the number.
inline uint32_t max_bf16x2(uint32_t a, uint32_t b) {
    return pack_bf16x2(fmaxf(float_from_bf16(a & 0xffff), float_from_bf16(b & 0xffff)),
                       fmaxf(float_from_bf16(a >> 16), float_from_bf16(b >> 16)));
}

inline uint32_t max_f16x2(uint32_t a, uint32_t b) {
    const float2 x = unpack_f16x2(a), y = unpack_f16x2(b);
    return pack_f16x2(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
}

}  // namespace warpo::cuda
