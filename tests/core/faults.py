"""Faults to plant in the core, for the checks to catch.

The text that a fault replaces has to stand in the sources exactly once, so none of these can rot
silently. A build with a fault has one rule, the baseline loops and few combinations of dtypes.
"""

from pathlib import Path

from .build import Fault, build

FLAGS = ["-O0"]  # what the compiler makes of a fault is not the point

# The files of rules, each with its rule as core/rules/list.h calls it.
RULES = {
    f"core/rules/{name.lower()}.h": name
    for name in (
        *("Adam", "Sgd", "RmsProp", "Lion", "AdEMAMix", "Adopt", "Adan"),
        *("Adamax", "Adadelta", "RAdam", "Adagrad", "Rprop", "NAdam", "Asgd", "Muon"),
        *("Lamb", "Lars"),
    )
} | {
    "core/rules/schedule_free.h": "ScheduleFreeAdamW",
    "core/rules/stable_adamw.h": "StableAdamW",
}
ADAM, SGD, RMSPROP, LION, ADEMAMIX, ADOPT, ADAN, ADAMAX, ADADELTA, RADAM, ADAGRAD, RPROP, *REST = (
    RULES
)
NADAM, ASGD, MUON, LAMB, LARS, SCHEDULE_FREE, STABLE_ADAMW = REST
AVERAGE = "core/rules/average.h"
ARITHMETIC, BLOCKS, CODES, CONTROL, DTYPE, MEASURE, NORM, RANDOM = (
    f"core/{name}.h"
    for name in ("arithmetic", "blocks", "codes", "control", "dtype", "measure", "norm", "random")
)
LOOP, CODED_LOOP, MEASURE_LOOP, NORM_LOOP, DISPATCH = (
    f"cpu/{name}" for name in ("update.h", "update_coded.h", "measure.h", "norm.h", "dispatch.cpp")
)
TILE, CODED_TILE, LANES, QUICK, MEASURE_TILE, NORM_TILE, PREPARE, DEVICE_STEP = (
    f"device/{name}.h"
    for name in (
        *("update", "update_coded", "lanes", "quick_math", "measure", "norm", "prepare", "step"),
    )
)

BIAS = "? one_minus_power(o.beta1, (long long)(step"
EPS = "corrected_eps(o.eps, correction2)"
DECAY = "row.coupled_decay = o.decoupled_weight_decay != 0 ? 0 : o.weight_decay;"
COUPLED = "row.coupled_decay = o.weight_decay; if (true) row.decoupled_decay = 0; else"
ROW = "to.row = args.rows == nullptr ? packed_rows - 1 : uint32_t(from.row);"
FACTOR = "if (args.control != nullptr) {\n    decltype(row.grad_factor) factor;"
GUARD = "work = *static_cast<const Work*>(context);"
NORM_GUARD = "work = *static_cast<const NormWork*>(context);"
GUARDED = "\n  const DefaultFloatingPoint guard;"
PART = "i < place.count; i += kLanes)"
LOOP_TAIL = "lane = 0; i + lane < count; ++lane) add_square"
NEXT = "(args.last ? args.total_chunks : step.gradients[next]"
RANGE = "i = thread; i < range.size; i += threads)"
SOURCE = "i = thread; i < args.sources; i += threads)"

# Where it matters that a build has another rule than its file tells.
RULES_OF_CHECKS = {"conversions": "Sgd", "multiply-add": "Sgd"}
RULES_OF_FAULTS = {
    "same bits: sign of a zero lost": "RmsProp",
    "prepare: first at any count": "Sgd",
    "prepare: counts before rows": "Adamax",  # of whose rows a full launch leaves room for counts
    "reference: decay where it goes against": "Lion",
    "measured: rare operands": "Lamb",
    "measured coded: lane of each block": "Lamb",
}

# The baseline's loops take no pairs of bfloat16.
WIDE = ("-mavx2", "-mf16c", "-DFUSEDOPT_F16C", "-include", "immintrin.h")
FLAGS_OF_FAULTS = {"conversions: pairs round ties up": WIDE}

# What is planted in which file, under the check that has to catch it.
FAULTS: dict[str, dict[str, tuple[str, str, str]]] = {
    "reference": {
        "no-op": (ADAM, "p -= change;", ""),
        "no-op of the loop": (LOOP, "narrow(p, param[i]);", ""),
        "no-op of the tile": (TILE, "narrow(value, s.param[i]);", ""),
        "no eps": (ADAM, EPS, "0"),
        "ten times eps": (ADAM, EPS, EPS.replace("o.eps", "10 * o.eps")),
        "eps not corrected": (ADAM, EPS, "o.eps"),
        "no eps in the root": (RMSPROP, "variance + row.eps_inside", "variance"),
        "decay coupled": (ADAM, DECAY, COUPLED),
        "step off by one": (ADAM, BIAS, f"{BIAS} - 1"),
        "first ignored": (SGD, "row.first != 0 ? g : ", ""),
        "maximize ignored": (SGD, "o.maximize != 0 ? -1 : 1", "1"),
        "no maximum in amsgrad": (ADAM, "second_moment = max_exp_avg_sq;", ""),
        "direction by the other beta": (
            LION,
            "moving_average<usual>(state[0], g, row.one_minus_beta1, row.beta1);",
            "moving_average<usual>(state[0], g, row.one_minus_beta2, row.beta2);",
        ),
        "decay not times lr": (LION, "o.lr * o.weight_decay", "o.weight_decay"),
        "alpha not warmed up": (ADEMAMIX, "row.slow_size *= step / o.alpha_warmup;", ";"),
        "slow average as fast": (
            ADEMAMIX,
            "g, row.one_minus_slow, row.slow)",
            "g, row.one_minus_beta1, row.beta1)",
        ),
        "clipped a step late": (ADOPT, "square_root(step - 1)", "square_root(step)"),
        "clipped from above only": (ADOPT, "change < -row.most ? -row.most : change", "change"),
        "a first difference": (ADAN, "row.first = step <= 1 ? 1 : 0;", "row.first = 0;"),
        "difference not in the square": (ADAN, "multiply_add(row.beta2, diff, g)", "g"),
        "norm without eps": (ADAMAX, "absolute(g) + row.eps", "absolute(g)"),
        "norm not decayed": (ADAMAX, "row.beta2 * exp_inf", "exp_inf"),
        "no eps in the numerator": (ADADELTA, "acc_delta + row.eps", "acc_delta"),
        "average of g, not delta": (ADADELTA, "(acc_delta, delta, row", "(acc_delta, g, row"),
        "rectified by another root": (RADAM, "(rho - 4) * (rho - 2) *", "(rho - 4) * (rho - 3) *"),
        "average not corrected": (
            RADAM,
            "row.step_size = o.lr / correction1;",
            "row.step_size = o.lr;",
        ),
        "decay of lr a step early": (ADAGRAD, "o.lr_decay * (step - 1)", "o.lr_decay * step"),
        "sum forgets": (ADAGRAD, "multiply_add(g, g, sum)", "multiply_add(g, g, T(0.9) * sum)"),
        "step back": (RPROP, "g = agreement < 0 ? T(0) : g;", ""),
        "steps of any length": (RPROP, "length > row.longest ? row.longest : length", "length"),
        "decay where it goes against": (AVERAGE, "against ? decay_against : decay", "decay"),
        "a moment of nothing": (ADAM, "row.beta1) : g;", "row.beta1) : T(0);"),
        "product of one mu": (NADAM, "o.mu_product * mu;", "mu;"),
        "mu of the next step": (NADAM, "mu = momentum(o, step),", "mu = momentum(o, step + 1),"),
        "eta of this step": (ASGD, "row.lr = o.eta;", "row.lr = o.lr;"),
        "average of the last": (ASGD, "row.mu = o.mu;", "row.mu = 1;"),
        "weights not added up": (SCHEDULE_FREE, "o.weight_sum + weight;", "weight;"),
        "no warm-up": (SCHEDULE_FREE, "step < o.warmup_steps ?", "false ?"),
        "average not moved": (SCHEDULE_FREE, "(-row.step_size, change,", "(0, change,"),
        "gradient has no second part": (MUON, "usual || row.nesterov != 0", "false"),
        "momentum not averaged": (
            MUON,
            "row.one_minus_momentum = 1 - o.momentum;",
            "row.one_minus_momentum = o.momentum;",
        ),
        "tail skipped by the loop": (LOOP, "i < end; ++i", "i < end - end % 8; ++i"),
        "tail skipped by the tile": (TILE, "i < s.numel)", "i < s.numel - s.numel % 8)"),
    },
    "same bits": {
        "tile starts too early": (TILE, "if (i >= 0 && i < s.numel)", "if (i < s.numel)"),
        "misaligned are skipped": (TILE, "if (i >= 0 &&", "if (aligned(s) && i >= 0 &&"),
        "grid skips a chunk": (TILE, "chunk += blocks)", "chunk += blocks + 1)"),
        "denormals flushed": (DISPATCH, GUARD + GUARDED, GUARD),
        "rare operands unnoticed": (QUICK, "{ return !(doubt_ == 0); }", "{ return false; }"),
        "root not refined": (QUICK, "(-root, root, value), 0.5f", "(0, root, 0), 0.5f"),
        "unusual rows average": (ASGD, "usual || row.mu == 1 ?", "usual ?"),
        "sign of a zero lost": (QUICK, "& 0x7fffffffu) | sign)", "& 0x7fffffffu))"),
        "last round of a chunk": (TILE, "< base + kChunk &&", "< base + 3 * kRound &&"),
    },
    "division": {
        "end of a piece skipped": (DISPATCH, "cut(*span, end)", "cut(*span, end - 64)"),
        "begin of a piece skipped": (DISPATCH, "cut(*span, begin)", "cut(*span, begin + 63)"),
        "span at a cut skipped": (DISPATCH, "s.offset + s.numel;", "s.offset + 1;"),
    },
    "many spans": {
        "first row for all": (TILE, ROW, ROW.replace("packed_rows - 1", "0")),
        "one launch only": (TILE, "  return next;", "  return count;"),
    },
    "memory": {
        "factor ignored": (TILE, "row.grad_factor *= factor;", ""),
        "sign of the row dropped": (TILE, "grad_factor *= factor;", "grad_factor = factor;"),
        "factor only with rows": (
            TILE,
            FACTOR,
            FACTOR.replace(") {", " && args.rows != nullptr) {"),
        ),
        "no factor in float": (
            CONTROL,
            "narrow_grad_factor = float(control.grad_factor)",
            "skip = 0",
        ),
        "skip ignored": (TILE, "&& args.control->skip != 0", "&& false"),
        "skip not set": (CONTROL, "control.skip = skipped(source);", "control.skip = 0;"),
        "first row in memory for all": (TILE, ROW, ROW.replace("uint32_t(from.row)", "0")),
    },
    "sum of squares": {
        "tail of the loop's sum": (NORM_LOOP, LOOP_TAIL, LOOP_TAIL.replace("< count", "< 0")),
        "tail of the tile's sum": (NORM_TILE, "if (at + j < count)", "if (at + width <= count)"),
        "packs skipped": (NORM_TILE, "at += kUnroll * stride)", "at += (kUnroll + 1) * stride)"),
        "end of a chunk": (DISPATCH, "min(kNormChunk,", "min(kNormChunk - 1,"),
        "chunk of a piece": (
            DISPATCH,
            "chunk = begin; chunk < end; ++chunk) {\n    while (gradient",
            "chunk = begin + (begin > 0); chunk < end; ++chunk) {\n    while (gradient",
        ),
        "chunk of a launch": (DEVICE_STEP, NEXT, NEXT.replace("next]", "next - 1]")),
        "empty gradient of the loop": (DISPATCH, "while (gradient + 1", "if (gradient + 1"),
        "empty gradient of the tile": (
            TILE,
            "].first_chunk <= chunk",
            "].first_chunk < chunk",
        ),
        "lanes of 16 bits": (
            NORM_LOOP,
            "quad = kQuadElements<Grad>",
            "quad = sizeof(Grad) == 8 ? 2 : 4",
        ),
        "lanes added otherwise": (NORM, "(i + half) * stride", "(2 * half - 1 - i) * stride"),
        "total in another order": (NORM, "[i % kTotalLanes]", "[i * kTotalLanes / count]"),
        "total of the tile": (NORM_TILE, "i = thread; i", "i = thread / 2 + thread % 2 * 128; i"),
        "squares in float": (DTYPE, "value * value;", "double(float(value) * float(value));"),
        "sums flush denormals": (DISPATCH, NORM_GUARD + GUARDED, NORM_GUARD),
        "total flushes denormals": (DISPATCH, f"{GUARDED}\n  return total_of", "return total_of"),
    },
    "prepare": {
        "counts before rows": (DEVICE_STEP, "if (source == step.source_count)", "if (true)"),
        "counts of a skipped step": (PREPARE, "if (skipped(args.factor)) return;", ""),
        "counts not advanced": (PREPARE, "range.counts[i] + 1 :", "range.counts[i] :"),
        "numbers counted": (PREPARE, "range.source == 0 ?", "true ?"),
        "numbers of another value": (PREPARE, "size_t(source / 2 - 1)", "size_t(source / 2)"),
        "counts of one turn": (PREPARE, RANGE, RANGE.replace("+= threads", "+= range.size")),
        "ranges of one launch": (DEVICE_STEP, "|| range < step.count_ranges) {", ") {"),
        "sources of one turn": (PREPARE, SOURCE, SOURCE.replace("+= threads", "+= args.sources")),
        "first at any count": (PREPARE, "source.first && taken == 0", "source.first"),
        "taken not counted": (PREPARE, "double(taken) + 1", "1"),
        "count in memory ignored": (PREPARE, "source.count == nullptr ?", "true ?"),
        "float32 options ignored": (PREPARE, "kind == OptionKind::float32", "false"),
        "float64 options ignored": (PREPARE, "kind == OptionKind::float64", "false"),
        "rows in float": (PREPARE, "taken == 0, source.float64", "taken == 0, false"),
    },
    "conversions": {
        "pairs round ties up": (LOOP, "(0x7fffu + ((bits >> 16) & 1u))", "0x8000u"),
        "bfloat16 cut off": (DTYPE, "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16", "bits >> 16"),
        "bfloat16 ties away": (DTYPE, "0x7fffu + ((bits >> 16) & 1u)", "0x8000u"),
    },
    "coded bits": {
        "neighbour overwritten": (
            LANES,
            "words[word_of<bytes>(i)] >> (8 * bytes * i % 32));",
            "words[word_of<bytes>(i)]);",
        ),
        "last element of a part": (
            CODED_TILE,
            PART,
            PART.replace("< place.count", "< place.count - 1"),
        ),
        "last block of the tile": (BLOCKS, "left < kBlock ? left : kBlock", "kBlock"),
        "rows of whole blocks only": (
            BLOCKS,
            "first = int64_t(rows) * row;",
            "first = rows * in_row() * kBlock;",
        ),
        "rows all as one": (BLOCKS, "row % kBlock == 0 ? numel : row", "numel"),
        "one lane in the scale": (
            LANES,
            "result = value(lane) > result ? value(lane) : result;",
            "result = value(lane);",
        ),
        "scale of the tile not stored": (
            CODED_TILE,
            "if (StateFormat::in_codes && number == 0) coding",
            "if (number < 0) coding",
        ),
        "scale of a part not stored": (CODED_TILE, "number == 0 && place.count > 0", "number < 0"),
        "a launch's spans share a coding": (
            CODED_TILE,
            "const TileSpan& s = spans[known];",
            "TileSpan s = spans[known]; s.coding.key = spans[0].coding.key;",
        ),
        "codes of the tile in order": (
            LANES,
            "const int i = q * kNeighbours + j;",
            "const int i = j * kNeighbours + q;",
        ),
        "signs of the tile": (LANES, "| (bytes_of<3>(values) & 0x80808080u)", ""),
        "squares of the tile to nearest": (
            CODED_TILE,
            "encode<decltype(of_squares)::value>(states_of[j]",
            "encode<false>(states_of[j]",
        ),
        "largest of all, not of the finite": (
            CODED_TILE,
            "magnitude > finite[k] && is_finite(magnitude)",
            "magnitude > finite[k]",
        ),
        "careless tile": (
            CODED_TILE,
            "careful[k] = !is_finite(",
            "careful[k] = false && !is_finite(",
        ),
        "master of the tile not stored": (
            LANES,
            "if constexpr (has_master) masters.store_of",
            "if constexpr (false) masters.store_of",
        ),
        "master of a part not stored": (
            LANES,
            "static_cast<Master*>(master)[i] = rest;",
            "(void)rest;",
        ),
        "scale of one block for all": (
            CODED_LOOP,
            "coding.scales[k] + number",
            "coding.scales[k]",
        ),
        "careless blocks": (CODED_LOOP, "if (is_careful(scale)) {", "if (false) {"),
        "infinite as the largest": (
            CODED_LOOP,
            "if (careful) largest = largest_finite(from, count);",
            "",
        ),
        "largest of positive ones": (LOOP, "magnitude_bits(value)", "float_to_bits(value)"),
        "dither of the first block": (
            CODED_LOOP,
            "dither_of_block(coding.first_block + block.number, coding.step)",
            "dither_of_block(0, coding.step)",
        ),
        "dither of another shard": (
            CODED_LOOP,
            "dither_of_block(coding.first_block + block.number, coding.step)",
            "dither_of_block(block.number, coding.step)",
        ),
        "dither from the first place": (
            CODED_LOOP,
            "kDither.values[first_place + i]",
            "kDither.values[i]",
        ),
        "random bits of the first block": (
            CODED_LOOP,
            "coding.step, coding.first_block + block.number)",
            "coding.step, 0)",
        ),
        "random bits of another shard": (
            CODED_LOOP,
            "coding.step, coding.first_block + block.number)",
            "coding.step, block.number)",
        ),
        "random bits from the first place": (
            CODED_LOOP,
            "random.of_place(coding.first_place + i)",
            "random.of_place(i)",
        ),
        "the same bits for both halves": (
            CODED_LOOP,
            "random.bits(uint32_t(i)) >> 16",
            "random.bits(uint32_t(i)) & 0xffffu",
        ),
        "master of the last block": (
            CODED_LOOP,
            "memcpy(block.master, room.master, size_t(count * bytes.master));",
            "",
        ),
        "master not kept": (CODED_LOOP, "memcpy(master, from, kBlock * sizeof(float));", ""),
        "changed weights unnoticed": (
            CODES,
            "float_to_bits(param) == float_to_bits(rounded_master) ?",
            "true ?",
        ),
        "negative zero in a careful block": (
            CODES,
            "special ? kNaN : q == 0 ? 0 : code",
            "special ? kNaN : code",
        ),
        "NaN as it is": (
            CODES,
            "value != value ? 0x7fc00000u : float_to_bits(value)",
            "float_to_bits(value)",
        ),
        "scale of denormals": (CODES, "magnitude < smallest ? smallest : magnitude", "magnitude"),
        "words not mixed": (RANDOM, "x ^ second ^ (x >> 15)", "x ^ (x >> 15)"),
        "steps in order": (RANDOM, "(reversed(step) ^", "(step ^"),
    },
    "coded memory": {
        "count in memory": (
            CODED_TILE,
            "coding.count == nullptr ? coding.step",
            "true ? coding.step",
        ),
        "blocks of another shard": (
            CODED_TILE,
            "coding.first_block + block.number;",
            "block.number;",
        ),
        "dither of a tile from the first place": (
            CODED_TILE,
            "dither(of_block, uint32_t(place.first + i))",
            "dither(of_block, uint32_t(i))",
        ),
        "random bits of a tile from the first place": (
            CODED_TILE,
            ".of_place(place.first + i)",
            ".of_place(i)",
        ),
        "skip of codes": (CODED_TILE, "&& args.control->skip != 0", "&& false"),
    },
    "coded division": {
        "cut within a block": (
            DISPATCH,
            "local - Blocks{span.numel, span.coding->row}.place_of(local)",
            "local / 64 * 64",
        ),
        "cut without rows": (DISPATCH, "if (span.coding == nullptr)", "if (true)"),
    },
    "coded reference": {
        "no-op of the last block": (
            CODED_LOOP,
            "memcpy(block.param, room.param, size_t(count * bytes.param));",
            "",
        ),
        "code of half the root": (
            CODES,
            "root_of<7>(magnitude * inverse) + 0.5f",
            "root_of<7>(magnitude * inverse)",
        ),
    },
    "isolation": {
        "NaN in the scale": (CODES, "{ return magnitude < 0x7f770000u; }", "{ return true; }"),
        "careful block is zero": (
            CODES,
            "largest == 0 ? 0 : 1 / scale",
            "careful ? 0 : 1 / scale",
        ),
    },
    "masters": {
        "ties to even": (
            CODES,
            "(bits + 0x8000u) >> 16",
            "(bits + 0x7fffu + (bits >> 16 & 1)) >> 16",
        ),
        "remainder without a sign": (
            CODES,
            "uint32_t(int32_t(remainder))",
            "uint32_t(uint16_t(remainder))",
        ),
        "24 bits cut off": (CODES, "(bits + 0x80u) & ~0xffu", "bits & ~0xffu"),
    },
    "random bits": {
        "step without weight": (RANDOM, "mix(key + step * kGolden)", "mix(key + step)"),
        "seed and ordinal mixed up": (
            RANDOM,
            "mix(mix(seed + kGolden) + ordinal * kGolden)",
            "mix(seed + ordinal * kGolden)",
        ),
        "both halves of a word": (RANDOM, "both & 0xffffu : both >> 16", "both >> 16 : both >> 16"),
    },
    "dither": {
        "places in order": (
            RANDOM,
            "of_block ^ (reversed(place) >> (32 - kDitherBits))",
            "of_block ^ place",
        ),
    },
    "dithering": {
        "squares to nearest": (CODES, "bits_to_float(0x3f800000u ^ dither)", "1.5f"),
        "infinite code in a careful block": (
            CODES,
            "special ? kInf : (code & 0xffu) > 254 ? 254 : code",
            "special ? kInf : code",
        ),
        "half a code off": (
            CODES,
            "power_of<8>(float_of_byte<2>(codes, byte))",
            "power_of<8>(float_of_byte<2>(codes, byte) + 0.5f)",
        ),
    },
    "codes": {
        "scale of 64 by 63": (CODES, "32.0f / 31, careful", "64.0f / 63, careful"),
        "no fourth root": (CODES, "(float_to_bits(ratio) >> 2)", "(float_to_bits(ratio) >> 3)"),
        "sign lost": (CODES, "| (codes << (24 - 8 * byte) & 0x80000000u);", ";"),
        "bytes in order": (BLOCKS, "place % kWords * 4 + place / kWords : place", "place : place"),
        "overflowing scale": (CODES, "magnitude < 0x7f770000u", "magnitude < 0x7f7f0000u"),
    },
    "measured": {
        "norm of p alone": (LAMB, "norms[0] / norms[1];", "norms[0];"),
        "length without decay": (LARS, "norms[1] + row.weight_decay * norms[0]", "norms[1]"),
        "a mean, no root": (STABLE_ADAMW, "square_root(means[0])", "means[0]"),
        "longer steps as well": (STABLE_ADAMW, "if (!(rms > 1)) return;", ""),
        "no mean of the mask": (ADAM, "row.with = cautious_scale(means[0]);", ""),
        "changes against g": (ADAM, "row.against = o.cautious != 0 ? 0 : 1;", "row.against = 1;"),
        "the average before": (LION, "agree(direction_of<false>(row, g, state), g)", "true"),
        "chunks in place of elements": (MEASURE, "double(chunks.numel)", "double(chunks.count)"),
        "last lanes left out": (
            MEASURE_LOOP,
            "lane < count; ++lane",
            "lane < count - count % 8; ++lane",
        ),
        "chunks that overlap": (
            DISPATCH,
            "from = (chunk - span->first_chunk) * kNormChunk;",
            "from = (chunk - span->first_chunk) * (kNormChunk / 2);",
        ),
        "parameter in two pieces": (
            DISPATCH,
            "span->measured == span[-1].measured) ++",
            "false) ++",
        ),
        "end of the chunk": (MEASURE_TILE, "begin + kNormChunk : s.numel;", "begin + 64 : 64;"),
        "rare operands": (MEASURE_TILE, "if (!quick.is_rare()) return;", "return;"),
        "row not completed": (TILE, "s.complete(args, row);", ""),
        "all are measured": (MEASURE_TILE, "return span.measured >= 0;", "return true;"),
    },
    "measured coded": {
        "lane of each block": (MEASURE_LOOP, "(i - begin) % kMeasureLanes", "0"),
        "code of a whole block": (
            MEASURE_TILE,
            "byte_of(int(i - place.begin), place.count)",
            "int(i - place.begin)",
        ),
        "scale of the first": (MEASURE_TILE, "coding.scales[k][number]", "coding.scales[k][0]"),
        "row of the last span": (CODED_TILE, "s.complete(args, row);", ""),
    },
    "multiply-add": {
        "rounded twice": (ARITHMETIC, "halfway & to_other ? other : nearest", "nearest"),
    },
}


def rule_of(check: str, name: str) -> str:
    """That a build with a fault has, as it is called in core/rules/list.h."""
    of_file = RULES.get(FAULTS[check][name][0], "Adam")
    return RULES_OF_FAULTS.get(f"{check}: {name}", RULES_OF_CHECKS.get(check, of_file))


def flags_of(check: str, name: str) -> tuple[str, ...]:
    """Those by which the loops of a build with a fault are not the baseline's."""
    return FLAGS_OF_FAULTS.get(f"{check}: {name}", ())


def make_faultless(rule: str, flags: tuple[str, ...] = ()) -> Path:
    folder = f"faultless-core-{rule}{'-wide' if flags else ''}"
    return build(folder, extra_flags=[*FLAGS, *flags], small=rule)


def make(check: str, name: str) -> Path:
    folder = f"fault-{name.replace(' ', '-')}"
    fault = Fault(*FAULTS[check][name])
    flags = [*FLAGS, *flags_of(check, name)]
    return build(folder, extra_flags=flags, faults=[fault], small=rule_of(check, name))
