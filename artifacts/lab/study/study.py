"""The study over several targets: models are read once, records are kept as they come."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from artifacts.lab.model import LabModel
from artifacts.lab.study.efficiency import TargetRecord, measure
from artifacts.lab.study.layers import fixed_sources, labellers_of, target_bench
from artifacts.lab.study.reading import Reading, untrained
from artifacts.lab.study.record import load_record, record_path, save_record
from artifacts.lab.study.source import Source

_UNTRAINED_SEED: Final = 0


def study(
    targets: Sequence[Path], expert: Path, out: Path, draws: int, progress: bool = True
) -> Iterator[TargetRecord]:
    """Measure each target with the expert, or read what an earlier run measured with the same models and settings.

    Args:
        targets: directories of lab models.
        expert: directory of a lab model.
        out: directory of the records; made if missing.
        draws: labelled sets per condition.
        progress: bars on stderr.

    Raises:
        OSError: a directory holds no model, or `out` cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = {target: record_path(out, target, expert, draws) for target in targets}
    kept = {target: load_record(path) for target, path in paths.items()}
    if all(kept.values()):
        yield from (record for record in kept.values() if record is not None)
        return
    models = {
        Source.MAPPED: Reading.of(LabModel.load(expert)),
        Source.UNTRAINED: Reading.of(untrained(expert, _UNTRAINED_SEED)),
    }
    # The expert labels the same for every target, so its labellers are kept.
    labellers = {
        Source.LABELS: labellers_of(models[Source.MAPPED]),
        Source.UNTRAINED_LABELS: labellers_of(models[Source.UNTRAINED]),
    }
    for target, path in paths.items():
        record = kept[target]
        if record is None:
            model = LabModel.load(target)
            reading = Reading.of(model)
            bench = target_bench(model, reading)
            sources = fixed_sources(bench, reading, models, labellers | {Source.SELF_LABELS: labellers_of(reading)})
            record = measure(
                (target.resolve().name, expert.resolve().name), bench, sources, draws=draws, progress=progress
            )
            save_record(path, record)
        yield record
