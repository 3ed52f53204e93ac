"""The page of the study: its tables, what they show, and the conclusions."""

from __future__ import annotations

from benchmarks.report.case import Json
from benchmarks.report.tables import table
from benchmarks.studies.codes.candidates import BLOCKS
from benchmarks.studies.codes.conclusions import conclusions
from benchmarks.studies.codes.results import tasks
from benchmarks.studies.codes.tables import ERROR_COLUMNS, error_rows, training_rows, update_table


def markdown(results: Json) -> str:
    """All tables, and the best code by every criterion."""
    source, settings = results["provenance"], results["settings"]
    commit = f"commit {source['commit'][:10]}" if source["commit"] else "no commit"
    dirty = " with changes" if source["commit"] and source["dirty"] else ""
    parts = [
        "# 8-bit codes for Adam's states\n\n"
        f"{source['processor']}, torch {source['torch']}, Python {source['python']}, "
        f"{source['date'][:10]}, {commit}{dirty}. By `python -m benchmarks.studies.codes`.\n\n"
        "A code stores a block of a state as one byte per element and the block's largest "
        "magnitude; `q` is a\nbyte without its sign, and what it means is a multiple of that "
        "magnitude. `exp_avg` is m, `exp_avg_sq` is v.\n\n",
        table(
            ("of", "code", "a byte means", "table-free", "encode; decode"),
            (
                [
                    "m" if code["signed"] else "v",
                    code["name"],
                    code["formula"],
                    "yes" if code["cheap"] else "no",
                    code["note"],
                ]
                for code in results["codes"]
            ),
            left=5,
        ),
        f"\n## Errors of states\n\nStates of trainings with float32 states ({sizes(results)} "
        f"elements; steps {', '.join(map(str, settings['snapshots']))}; the mean over\nthe steps), "
        "stored once: `|x - decoded| / |x|` over all x that are not zero, and the share of these "
        "that\nare decoded as zero. `always`: the 99th percentile when a state is stored at every "
        "step, with the\nsame gradients, before it is encoded; `drift`: the median of these errors "
        "with their signs.\n\n",
        table(
            (
                *("of", "code", "block"),
                *(f"{task}: {what}" for task in tasks(results) for what in ERROR_COLUMNS),
            ),
            error_rows(results),
            left=2,
        ),
        "\n## Errors of updates\n\n`|u - u_exact| / |u_exact|` of `u = m_hat / (sqrt(v_hat) + "
        "eps)`, a geometric mean over tasks and steps. The\nfirst number: states stored at every "
        "step, decoded before a step and used before they are encoded\nafter it. The second: "
        "decoded states, stored once.\n",
    ]
    for block in BLOCKS:
        parts += [f"\nBlocks of {block}:\n\n", update_table(results, block)]
    parts += [
        f"\n## Trainings\n\nAdamW, betas {settings['betas']}, cosine learning rates, "
        f"{settings['seeds']} seeds, steps: "
        + ", ".join(f"{task} {steps}" for task, steps in settings["steps"].items())
        + earlier(results)
        + f". Parameters of fewer than {settings['smallest_encoded_parameter']:,} elements keep\n"
        f"float32 states. Losses at the end: `train` is the mean of the last {settings['last']}, "
        "`unseen` that of data not trained on; mean\nand standard deviation over the seeds. "
        "`difference`: from float32 states with the same seed, mean and\nits standard error. The "
        "row with moved weights shows what rounding alone makes of a training.\n\n",
        table(
            (
                *("task", "m", "v", "block"),
                *("unseen", "difference", "train", "difference"),
            ),
            training_rows(results),
            left=3,
        ),
        "\n## Conclusions\n\n",
        *(f"- {line}\n" for line in conclusions(results)),
    ]
    return "".join(parts)


def earlier(results: Json) -> str:
    """When the trainings were made that were taken over from earlier runs."""
    dates = sorted({source["date"] for source in results.get("earlier", ())})
    return f"; some from earlier runs ({', '.join(dates)})" if dates else ""


def sizes(results: Json) -> str:
    """Elements of the encoded states, by task."""
    return ", ".join(f"{task} {count:,}" for task, count in results["settings"]["elements"].items())
