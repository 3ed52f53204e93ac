// SPDX-License-Identifier: Apache-2.0
// Copyright the fusedopt authors
//
// How the elements of a parameter are cut into blocks, which share a scale and are rounded
// together.
#pragma once

#include "random.h"

namespace fusedopt {

// The most elements of a block.
constexpr int kBlock = 256;
static_assert(kBlock == 2 * kRandomPairs, "a block's random bits come from hashes for two each");

// The codes of a whole block lie in so many words: the least significant bytes of these are the
// codes of the block's first quarter, and so on. Thus bytes become lanes of 32 bits by shifts.
constexpr int kWords = kBlock / 4;

// Where the code of an element is in the bytes of its block. A block with fewer elements has theirs
// one behind the other.
FUSEDOPT_HD int byte_of(int place, int count) {
  return count == kBlock ? place % kWords * 4 + place / kWords : place;
}

// A block of a parameter: its number, the elements before it, and how many it has.
struct BlockPlace {
  int64_t number, begin;
  int count;
};

// A block ends after kBlock elements, and where a row does. So rows can be shared out among
// processes as they are, with their codes and scales.
struct Blocks {
  int64_t numel, row;  // elements, of all and of a row; where there are no rows, all are one

  FUSEDOPT_HD int64_t in_row() const { return (row + kBlock - 1) / kBlock; }
  FUSEDOPT_HD int64_t count() const { return numel == 0 ? 0 : numel / row * in_row(); }

  // The same blocks, as one row where all of them are whole.
  FUSEDOPT_HD Blocks joined() const { return {numel, row % kBlock == 0 ? numel : row}; }

  // The number of the block of an element, and the elements of that block before it.
  FUSEDOPT_HD int64_t number_of(int64_t element) const {
    return element / row * in_row() + element % row / kBlock;
  }
  FUSEDOPT_HD int place_of(int64_t element) const { return int(element % row % kBlock); }

  // The block of a number below count(); of a larger one, a place behind the last element. Number:
  // in which a division is cheap, and which holds all of them.
  template <class Number>
  FUSEDOPT_HD BlockPlace at(Number number) const {
    Number in_row_number = number;
    int64_t first = 0;
    if (row != numel) {
      const Number rows = number / Number(in_row());
      in_row_number = number - rows * Number(in_row());
      first = int64_t(rows) * row;
    }
    const int64_t before = int64_t(in_row_number) * kBlock, left = row - before;
    return {int64_t(number), first + before, int(left < kBlock ? left : kBlock)};
  }
};

}  // namespace fusedopt
