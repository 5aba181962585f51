/* Matrix products at the rate of the core's widest vectors, which not every library uses.
 *
 * Both sides are packed block by block: a block of the right side stays in the second cache while
 * the tiles of the left side pass, and what a tile reads stays in the first.
 */
#include <stdlib.h>

#include "native_tile.h"

#define BLOCK_ROWS (72 * ROWS)
#define BLOCK_COLUMNS (8 * PANEL)
#define BLOCK_DEPTH 256
#define CHAINS 12 /* of multiply-adds that do not wait for one another */

typedef struct { /* strides count floats; out's columns lie side by side */
    int64_t batch, rows, columns, depth;
    int64_t left_batch, right_batch, out_batch;
    int64_t left_row, left_step, right_column, right_step, out_row;
    int64_t add; /* to what `out` holds */
    const float *left, *right;
    float *out;
} Product;

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

int64_t lane_count(void) { return LANES; }

/* What the core can do at most: multiply-adds in registers alone. Returns how many operations. */
int64_t multiply_adds(int64_t rounds, float factor) {
    lanes sum[CHAINS];
    for (int i = 0; i < CHAINS; i++) sum[i] = (lanes){0} + factor * i;
    for (int64_t round = 0; round < rounds; round++)
        UNROLLED for (int i = 0; i < CHAINS; i++) sum[i] = sum[i] * factor + factor;
    volatile float kept = 0; /* else nothing would be done */
    for (int i = 0; i < CHAINS; i++) kept += sum[i][0];
    return rounds * CHAINS * LANES * 2;
}

Tile *tile_for(int64_t rows, int64_t columns) { return tiles[rows - 1][columns > LANES]; }

/* Multiply a packed block; `rows` and `columns` are its own, `out` its corner. */
static void multiply_block(const float *left, const float *right, int64_t rows, int64_t columns,
                           int64_t depth, float *out, int64_t stride, int add) {
    float whole[ROWS * PANEL]; /* a tile that sticks out at the right */
    for (int64_t t = 0; t < parts_of(rows, ROWS); t++) {
        int64_t first = part_start(rows, ROWS, t), count = part_start(rows, ROWS, t + 1) - first;
        for (int64_t column = 0; column < columns; column += PANEL) {
            int64_t wanted = at_most(PANEL, columns - column);
            Tile *tile = tile_for(count, wanted);
            float *corner = out + first * stride + column;
            const float *panel = right + column * depth;
            if (wanted == PANEL) {
                tile(left + first * depth, panel, depth, corner, stride, add);
                continue;
            }
            tile(left + first * depth, panel, depth, whole, PANEL, 0);
            for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < wanted; j++) {
                    float *cell = corner + i * stride + j;
                    *cell = whole[i * PANEL + j] + (add ? *cell : 0);
                }
        }
    }
}

static void pack_left(const Product *call, int64_t row, int64_t rows, int64_t from, int64_t depth,
                      float *packed) {
    const float *corner = call->left + row * call->left_row + from * call->left_step;
    for (int64_t t = 0; t < parts_of(rows, ROWS); t++) {
        int64_t first = part_start(rows, ROWS, t), count = part_start(rows, ROWS, t + 1) - first;
        pack(corner + first * call->left_row, call->left_row, call->left_step, count, depth, count,
             packed + first * depth);
    }
}

static void pack_right(const Product *call, int64_t column, int64_t columns, int64_t from,
                       int64_t depth, float *packed) {
    const float *corner = call->right + column * call->right_column + from * call->right_step;
    for (int64_t first = 0; first < columns; first += PANEL)
        pack(corner + first * call->right_column, call->right_column, call->right_step,
             at_most(PANEL, columns - first), depth, PANEL, packed + first * depth);
}

static void multiply_one(const Product *call, float *left, float *right) {
    int64_t rows, columns, depth;
    if (!call->depth && !call->add)
        for (int64_t row = 0; row < call->rows; row++)
            memset(call->out + row * call->out_row, 0, 4 * call->columns);
    for (int64_t row = 0; row < call->rows; row += rows) {
        rows = at_most(BLOCK_ROWS, call->rows - row);
        for (int64_t from = 0; from < call->depth; from += depth) {
            depth = at_most(BLOCK_DEPTH, call->depth - from);
            pack_left(call, row, rows, from, depth, left);
            for (int64_t column = 0; column < call->columns; column += columns) {
                columns = at_most(BLOCK_COLUMNS, call->columns - column);
                pack_right(call, column, columns, from, depth, right);
                multiply_block(left, right, rows, columns, depth,
                               call->out + row * call->out_row + column, call->out_row,
                               call->add || from);
            }
        }
    }
}

/* out = left x right, of every matrix of a batch; returns 0, or 1 where memory is lacking. */
int multiply(const Product *call) {
    int64_t rows = at_most(call->rows, BLOCK_ROWS), depth = at_most(call->depth, BLOCK_DEPTH);
    int64_t columns = at_most(panels_of(call->columns) * PANEL, BLOCK_COLUMNS);
    float *left = malloc(4 * (rows + columns) * depth + 64);
    if (!left) return 1;
    Product one = *call;
    for (int64_t number = 0; number < call->batch; number++) {
        multiply_one(&one, left, left + rows * depth);
        one.left += call->left_batch, one.right += call->right_batch, one.out += call->out_batch;
    }
    free(left);
    return 0;
}
