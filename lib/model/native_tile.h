/* A tile of a matrix product that stays in registers, and how its operands are packed.
 *
 * A tile has up to ROWS rows, PANEL columns: with 512-bit vectors 14 x 2 of 32 registers sum, two
 * hold the right side, and each number of the left side is broadcast. Both sides are read in the
 * order they are packed in. The packed left side is [depth][rows of the tile], tile after tile; the
 * packed right side is [depth][PANEL], panel after panel, the last one padded with zeros.
 */
#ifndef NATIVE_TILE_H
#define NATIVE_TILE_H
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#define ROWS 14
#else
#define LANES 8
#define ROWS 6
#endif
#define VECTORS 2
#define PANEL (VECTORS * LANES)

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t whole_lanes __attribute__((vector_size(4 * LANES), aligned(4)));

/* R and W are constants where it is called: loops over them unroll, sums lie in registers. */
#define FIXED static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

FIXED int64_t at_most(int64_t one, int64_t other) { return one < other ? one : other; }
FIXED int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* `count` shared evenly by as many parts as it needs, of `most` each: small last ones are slow. */
FIXED int64_t parts_of(int64_t count, int64_t most) { return (count + most - 1) / most; }
FIXED int64_t part_start(int64_t count, int64_t most, int64_t number) {
    return count * number / parts_of(count, most);
}

FIXED lanes larger(lanes one, lanes other) {
    whole_lanes first = one > other;
    return (lanes)((first & (whole_lanes)one) | (~first & (whole_lanes)other));
}

/* out = left x right, or out += where `add`; whole vectors of `out` are written. */
typedef void Tile(const float *left, const float *right, int64_t depth, float *out, int64_t stride,
                  int add);

/* The tile of so many rows for a panel of which so many columns are wanted. */
Tile *tile_for(int64_t rows, int64_t columns);

typedef float quad __attribute__((vector_size(16), aligned(4)));
typedef int32_t quad_places __attribute__((vector_size(16)));
#ifdef __clang__
#define MIXED __builtin_shufflevector
#else
#define MIXED(one, other, ...) __builtin_shuffle(one, other, (quad_places){__VA_ARGS__})
#endif

/* Four numbers of each of four rows, turned. */
FIXED void turn(const float *rows, int64_t stride, float *packed, int64_t width) {
    quad a = *(const quad *)rows, b = *(const quad *)(rows + stride);
    quad c = *(const quad *)(rows + 2 * stride), d = *(const quad *)(rows + 3 * stride);
    quad ab = MIXED(a, b, 0, 4, 1, 5), cd = MIXED(c, d, 0, 4, 1, 5);
    *(quad *)packed = MIXED(ab, cd, 0, 1, 4, 5);
    *(quad *)(packed + width) = MIXED(ab, cd, 2, 3, 6, 7);
    ab = MIXED(a, b, 2, 6, 3, 7), cd = MIXED(c, d, 2, 6, 3, 7);
    *(quad *)(packed + 2 * width) = MIXED(ab, cd, 0, 1, 4, 5);
    *(quad *)(packed + 3 * width) = MIXED(ab, cd, 2, 3, 6, 7);
}

/* packed[k * width + i] = rows[i * stride + k] for i < count: rows become columns.
 *
 * A few numbers of every row at a time, so that what is written stays in the first cache.
 */
FIXED void pack_columns(const float *rows, int64_t stride, int64_t count, int64_t depth,
                        int64_t width, float *packed) {
    for (int64_t from = 0; from < depth; from += 64) {
        int64_t to = at_most(from + 64, depth), fours = from + (to - from) / 4 * 4, i = 0;
        for (; i + 4 <= count; i += 4)
            for (int64_t k = from; k < fours; k += 4)
                turn(rows + i * stride + k, stride, packed + k * width + i, width);
        for (int64_t j = 0; j < count; j++)
            for (int64_t k = j < i ? fours : from; k < to; k++)
                packed[k * width + j] = rows[j * stride + k];
    }
}

/* packed[k][i] = source[i * item + k * step] for i < count, 0 for the rest of `width`. */
FIXED void pack(const float *source, int64_t item, int64_t step, int64_t count, int64_t depth,
                int64_t width, float *packed) {
    if (item == 1)
        for (int64_t k = 0; k < depth; k++)
            memcpy(packed + k * width, source + k * step, 4 * count);
    else if (step == 1)
        pack_columns(source, item, count, depth, width, packed);
    else
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < depth; k++) packed[k * width + i] = source[i * item + k * step];
    for (int64_t k = 0; count < width && k < depth; k++)
        memset(packed + k * width + count, 0, 4 * (width - count));
}
#endif
