"""The learning rates of `priorityprop train`: by factors of two, until the best lies inside.

Mean validation loss at the end, on seeds that the command does not use by itself. Run as
`python -m benchmarks.compare_rates`; takes some minutes. Writes
`benchmarks/results/compare_rates-cpu.json`.
"""

from __future__ import annotations

from statistics import fmean

import jax

from benchmarks.rates import next_rates
from benchmarks.records import RESULTS, about, write
from priorityprop_jax.cli import compare
from priorityprop_jax.cli.tasks import characters

SEEDS = (100, 101, 102)


def tune(arm: str, loss_fn: object, start: float = 8e-3) -> dict[float, float]:
    """The mean loss of every rate that was tried."""
    tasks = [characters(seed=seed) for seed in SEEDS]
    found: dict[float, float] = {}
    while rates := next_rates(found, (start / 2, start, 2 * start)):
        for rate in rates:
            program = compare.Arm(arm, tasks[0], loss_fn, rate)
            found[rate] = fmean(program.run(task)["loss"][-1] for task in tasks)
            print(f"{arm} {rate:g}: {found[rate]:.4f}", flush=True)
    return found


def main() -> None:
    loss_fn = compare.loss_of(characters())
    record = about("compare_rates") | {"seeds": SEEDS, "loss_by_rate": {}}
    for arm in compare.RATES:
        record["loss_by_rate"][arm] = tune(arm, loss_fn)
    write(RESULTS / f"compare_rates-{jax.default_backend()}.json", record)


if __name__ == "__main__":
    main()
