"""What the second world shows: differences between estimators, layer by layer readability, and plain sentences."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from artifacts.evaluation.statistics import Interval
from artifacts.lab.nonlinear.measure import LayerRecord, Way
from artifacts.lab.table.output import interval_text
from artifacts.lab.table.row import Row

_RIVALS = (Way.DIFFERENCE, Way.LOGISTIC, Way.RANDOM)


@dataclass(frozen=True)
class Advantage:
    """Accuracy of the RFM's direction minus a rival's on one target, over the same test facts."""

    target: str
    rival: Way
    difference: Interval

    @property
    def verdict(self) -> str:
        """What the 95 % interval says."""
        if self.difference.low > 0:
            return "beats"
        return "loses to" if self.difference.high < 0 else "cannot be told from"

    def record(self) -> dict[str, object]:
        """Everything as JSON values."""
        difference = {name: round(value, 4) for name, value in self.difference._asdict().items()}
        return {"target": self.target, "rival": self.rival.name.lower(), "difference": difference}


def advantages(rows: Sequence[Row]) -> list[Advantage]:
    """The RFM against every rival, in the order of the targets."""
    by_name = {(row.target, row.kind): row for row in rows}
    targets = list(dict.fromkeys(row.target for row in rows))
    return [
        Advantage(target, rival, by_name[target, Way.RFM].minus(by_name[target, rival]))
        for target in targets
        for rival in _RIVALS
    ]


def sentences(found: Sequence[Advantage], layers: Sequence[LayerRecord]) -> list[str]:
    """Against whom the RFM wins on how many targets, and how the label reads where the axis steers best."""
    said = []
    for rival in _RIVALS:
        verdicts = [each.verdict for each in found if each.rival is rival]
        counts = ", ".join(f"{verdict} it on {verdicts.count(verdict)}" for verdict in dict.fromkeys(verdicts))
        said.append(f"RFM against {rival.value}: {counts} of {len(verdicts)} targets.")
    for target in dict.fromkeys(each.target for each in layers):
        own = [each for each in layers if each.target == target]
        best = max(own, key=lambda each: each.accuracy[Way.AXIS])
        hidden = min(own, key=lambda each: each.readability.logistic - each.readability.quadratic)
        at_best, at_hidden = best.readability, hidden.readability
        said.append(
            f"{target}: the axis steers best at layer {best.layer} ({best.accuracy[Way.AXIS]:.3f}), where a linear "
            f"probe reads the label with AUC {at_best.logistic:.2f}; it is least linear at layer {hidden.layer} "
            f"(linear {at_hidden.logistic:.2f}, quadratic {at_hidden.quadratic:.2f}; cosine with the axis: RFM "
            f"{at_hidden.cosine_rfm:.2f}, difference of means {at_hidden.cosine_difference:.2f}), where the axis "
            f"steers to {hidden.accuracy[Way.AXIS]:.3f}."
        )
    return said


def rich_advantages(found: Sequence[Advantage]) -> Table:
    """One line per target and rival."""
    table = Table(title="RFM minus another direction")
    for name in ("target", "RFM ..", "", "difference"):
        table.add_column(name, no_wrap=True)
    for each in found:
        table.add_row(each.target, each.verdict, each.rival.value, interval_text(each.difference))
    return table


def rich_layers(layers: Sequence[LayerRecord]) -> Table:
    """Readability and accuracy of every layer."""
    caption = "AUC on introductions that no probe saw; |cosine| with the axis; test accuracy of steering at that layer"
    table = Table(title="Layer by layer", caption=caption)
    for name in ("target", "layer", "AUC mean diff.", "AUC logistic", "AUC quadratic"):
        table.add_column(name)
    for name in ("cos mean diff.", "cos logistic", "cos RFM", "cos RFM, mean diff.", "RFM top eigenvalue"):
        table.add_column(name)
    for way in (Way.AXIS, Way.DIFFERENCE, Way.LOGISTIC, Way.RFM):
        table.add_column(f"steer {way.name.lower()}")
    for each in layers:
        read = each.readability
        numbers = (
            *(read.difference, read.logistic, read.quadratic),
            *(read.cosine_difference, read.cosine_logistic, read.cosine_rfm),
            *(read.cosine_rfm_difference, read.eigenvalue),
            *(each.accuracy[way] for way in (Way.AXIS, Way.DIFFERENCE, Way.LOGISTIC, Way.RFM)),
        )
        table.add_row(each.target, str(each.layer), *(f"{number:.2f}" for number in numbers))
    return table


def layer_record(each: LayerRecord) -> dict[str, object]:
    """Everything of a layer as JSON values."""
    readability = {name: round(value, 4) for name, value in asdict(each.readability).items()}
    accuracy = {way.name.lower(): round(value, 4) for way, value in each.accuracy.items()}
    return {"target": each.target, "layer": each.layer, "readability": readability, "accuracy": accuracy}
