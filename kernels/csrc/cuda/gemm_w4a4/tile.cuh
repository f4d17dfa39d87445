// How a block divides its tile among its threads, and what lies in shared memory.
#pragma once

#include "../primitives.cuh"
#include "mma.cuh"

namespace nibble::cuda {

constexpr int COLUMNS = 128;  // of every tile
template <int Rows>
constexpr int THREADS = Rows > 128 ? 256 : 128;

// Four warps share a tile two by two, eight the tallest one four by two. A warp's share is 64
// columns wide: a group of the next layer,
// which one warp can thus quantize. Large shares of few warps (64x64 is 128 sums a lane) leave less
// to do for each product: fragments are loaded and scales are widened once for eight or four
// products, where twice the warps would do it for four.
//
// A share consists of MT x NT products of 16 x 8, of which a lane gets rows g, g + 8 and columns
// 2t, 2t + 1. Which rows and columns of the share a product takes is free, so they are dealt out
// such that a lane's are neighbours: 2 MT rows from row_of(g, 0, 0) on and 16 columns from
// column_of(t, 0, 0) on. Then a lane reads its scales with few wide loads and writes out 16 bytes
// at a time, straight from registers.
template <int Rows>
struct Tile {
    static constexpr int ROWS = Rows, WARP_ROWS = Rows / (THREADS<Rows> / 64),
                         WARP_COLUMNS = COLUMNS / 2;
    static constexpr int MT = WARP_ROWS / 16, NT = WARP_COLUMNS / 8;

    // Where the share of a thread's warp begins, in the tile.
    NIBBLE_DEVICE static int first_row(int thread) { return thread / 64 * WARP_ROWS; }
    NIBBLE_DEVICE static int first_column(int thread) { return thread / 32 % 2 * WARP_COLUMNS; }
    NIBBLE_DEVICE static int row_of(int g, int i, int half) {
        return g * 2 * MT + 2 * i + half;
    }  // of product i, row g + 8 half
    NIBBLE_DEVICE static int column_of(int t, int j, int n) {
        return t * 2 * NT + 2 * j + n;
    }  // of product j, column 2t + n
    // The inverse: where in shared memory a row or column of the tile lies, in the order in which
    // the products take them.
    NIBBLE_DEVICE static int place_of_row(int row) {
        const int in = row % WARP_ROWS, g = in / (2 * MT), rest = in % (2 * MT);
        return row - in + rest / 2 * 16 + rest % 2 * 8 + g;
    }
    NIBBLE_DEVICE static int place_of_column(int column) {
        const int in = column % WARP_COLUMNS, t = in / (2 * NT), rest = in % (2 * NT);
        return column - in + rest / 2 * 8 + 2 * t + rest % 2;
    }
};

// Blocks that run together should share operands in the L2 cache: eight tiles of rows are walked
// down before the next column of tiles.
struct Corner {
    int row, column;
};
NIBBLE_DEVICE Corner corner_of_block(int64_t M, int64_t N, int rows, unsigned block) {
    constexpr unsigned BAND = 8;
    const unsigned down = unsigned((M + rows - 1) / rows),
                   across = unsigned((N + COLUMNS - 1) / COLUMNS);
    const unsigned first = block / (BAND * across) * BAND,
                   height = down - first < BAND ? down - first : BAND;
    const unsigned rest = block % (BAND * across);
    return {int((first + rest % height) * rows), int(rest / height * COLUMNS)};
}

// One group (k = 64) of a tile, its chunks of 16 bytes where the operands' readers want them.
template <class Mma, class Tp, int Rows>
struct Group {
    alignas(16) uint8_t a[Rows * Mma::ROW_BYTES];
    uint8_t b[COLUMNS * 32];
    float ascales[Rows];
    Tp weight_scales[COLUMNS];
    static constexpr int B = Rows * Mma::ROW_BYTES, ASCALES = B + COLUMNS * 32,
                         WEIGHT_SCALES = ASCALES + Rows * 4;  // where they begin, in bytes
};

// BLOCKS that are to live on a multiprocessor, which bounds the registers (widened fragments need
// more of them); STEP, the groups that are copied, waited for and computed together; and how many
// such STAGES the ring has. All blocks' rings should fit into the 100 KB of 8.6, 8.9 and 12.0, and
// 48 KB need no permission. The smallest tiles are for few tokens, when there are few blocks and
// the weight's bandwidth is all that counts: more is in flight there. Turing stages through
// registers, of which there are few. The tallest tile's only block has a third stage: no other
// block computes while it waits.
template <class Mma, int Rows>
constexpr int BLOCKS = Rows == 256                    ? 1
                       : Rows == 32                   ? 4
                       : Rows == 64 && Mma::UNIT == 1 ? 3
                                                      : 2;
//
// Activations of 8 bits make a group of 128 tokens 13 KB instead of 9: one a stage and three stages
// (39 KB) let two blocks live where two of two would not (52 KB); so do three stages of the
// smallest.
template <class Mma>
constexpr bool WIDE = Mma::ROW_BYTES == 64;
template <class Mma, int Rows>
constexpr int STEP = Mma::ASYNC && !(WIDE<Mma> && Rows == 128) ? 2 : 1;
template <class Mma, int Rows>
constexpr int STAGES = !Mma::ASYNC || Rows == 64 ? 2
                       : WIDE<Mma>               ? 3
                       : Rows == 128             ? 2
                       : Rows == 32              ? 4
                                                 : 3;

}  // namespace nibble::cuda
