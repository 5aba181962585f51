/* A tile of a matrix product that stays in registers, and how its operands are packed.
 *
 * A tile has up to ROWS rows and PANEL columns: with 512-bit vectors 14 x 2 of 32 registers sum, two
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

/* R and W are constants where it is called: loops over them unroll, `sum` lies in registers. */
#define FIXED static inline __attribute__((always_inline))
#define UNROLLED _Pragma("GCC unroll 16")

FIXED int64_t panels_of(int64_t columns) { return (columns + PANEL - 1) / PANEL; }

/* Rows of tile `number` of the `tiles` that share `rows` evenly: small last tiles would be slow. */
FIXED int64_t tiles_of(int64_t rows) { return (rows + ROWS - 1) / ROWS; }
FIXED int64_t tile_start(int64_t rows, int64_t number) { return rows * number / tiles_of(rows); }

FIXED void sum_tile(const int R, const int W, const float *left, const float *right, int64_t depth,
                    lanes sum[ROWS][VECTORS]) {
    UNROLLED for (int i = 0; i < R; i++)
        UNROLLED for (int w = 0; w < W; w++) sum[i][w] = (lanes){0};
    for (int64_t k = 0; k < depth; k++, left += R, right += PANEL) {
        lanes row[VECTORS];
        UNROLLED for (int w = 0; w < W; w++) row[w] = *(const lanes *)(right + w * LANES);
        UNROLLED for (int i = 0; i < R; i++)
            UNROLLED for (int w = 0; w < W; w++) sum[i][w] += left[i] * row[w];
    }
}

/* out = left x right, or out += where `add`; a whole panel of `out` is written. */
typedef void Tile(const float *left, const float *right, int64_t depth, float *out, int64_t stride,
                  int add);

#define TILE(R, W)                                                                                \
    static void tile_##R##_##W(const float *left, const float *right, int64_t depth, float *out,  \
                               int64_t stride, int add) {                                         \
        lanes sum[ROWS][VECTORS];                                                                 \
        sum_tile(R, W, left, right, depth, sum);                                                  \
        UNROLLED for (int i = 0; i < R; i++) UNROLLED for (int w = 0; w < W; w++) {               \
            lanes *cell = (lanes *)(out + i * stride + w * LANES);                                \
            *cell = add ? *cell + sum[i][w] : sum[i][w];                                          \
        }                                                                                         \
    }
#define TILES(R) TILE(R, 1) TILE(R, 2)
#define PAIR(R) {tile_##R##_1, tile_##R##_2}

TILES(1) TILES(2) TILES(3) TILES(4) TILES(5) TILES(6)
#if ROWS == 14
TILES(7) TILES(8) TILES(9) TILES(10) TILES(11) TILES(12) TILES(13) TILES(14)
static Tile *const tiles[ROWS][VECTORS] = {
    PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), PAIR(6), PAIR(7),
    PAIR(8), PAIR(9), PAIR(10), PAIR(11), PAIR(12), PAIR(13), PAIR(14)};
#else
static Tile *const tiles[ROWS][VECTORS] = {PAIR(1), PAIR(2), PAIR(3), PAIR(4), PAIR(5), PAIR(6)};
#endif

/* The tile of so many rows for a panel of which so many columns are wanted. */
FIXED Tile *tile_for(int64_t rows, int64_t columns) {
    return tiles[rows - 1][columns > LANES];
}

/* packed[k][i] = source[i * item + k * step] for i < count, 0 for the rest of `width`. */
static void pack(const float *source, int64_t item, int64_t step, int64_t count, int64_t depth,
                 int64_t width, float *packed) {
    if (item == 1)
        for (int64_t k = 0; k < depth; k++)
            memcpy(packed + k * width, source + k * step, 4 * count);
    else
        for (int64_t i = 0; i < count; i++)
            for (int64_t k = 0; k < depth; k++) packed[k * width + i] = source[i * item + k * step];
    for (int64_t k = 0; count < width && k < depth; k++)
        memset(packed + k * width + count, 0, 4 * (width - count));
}
#endif
