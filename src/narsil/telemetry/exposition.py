"""What an observer has counted, as Prometheus reads it. Nothing here runs before somebody asks."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from narsil.telemetry.observer import CountingObserver
from narsil.telemetry.tally import BATCH_SIZES, FEATURE_COUNTS, SCORES, SECONDS, STAGES, Distribution

__all__ = ["Exposition"]

Queues = Callable[[], Mapping[tuple[str, str], Mapping[str, int]]]  # (name, version) -> what waits
FeatureNames = Callable[[str, str], Sequence[str]]  # of a model's name and version, as long as it is served

_MODEL = ["model", "version"]
# How an error's class ended its request; others failed.
_OUTCOMES = {
    "answered": "answered",
    "QueueFull": "rejected",
    "Draining": "rejected",
    "InvalidRequest": "rejected",
    "DeadlineExceeded": "expired",
    "Cancelled": "cancelled",
}
# Of what owners count themselves, what is so many now rather than since the start.
_NOW = frozenset({"queued", "running", "open_connections", "open_calls", "watchers", "buffered"})


class Exposition:
    """The metrics page."""

    def __init__(self, observer: CountingObserver, queues: Queues, feature_names: FeatureNames) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Narsil(observer, queues, feature_names))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def page(self, accept: str) -> tuple[bytes, str]:
        """The text, and its content type, in the form that an Accept header asks for."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Narsil(Collector):
    def __init__(self, observer: CountingObserver, queues: Queues, feature_names: FeatureNames) -> None:
        self._observer = observer
        self._queues = queues
        self._feature_names = feature_names

    def collect(self) -> Iterable[Metric]:
        yield from self._models()
        yield from self._requests()
        yield from self._batches()
        yield from self._waiting()
        yield from self._scores()
        yield from self._features()
        yield from self._rare()
        yield from self._kept_by_others()

    def _models(self) -> Iterator[Metric]:
        build = {"version": version("narsil"), "python": platform.python_version()}
        yield InfoMetricFamily("narsil_build", "What runs.", build)
        served = GaugeMetricFamily("narsil_model_served", "1 for each model that can be named now.", labels=_MODEL)
        for model in self._observer.models():
            served.add_metric(model, 1)
        yield served

    def _requests(self) -> Iterator[Metric]:
        ends = CounterMetricFamily(
            "narsil_requests",
            "Requests that the engine has ended, by how and why.",
            labels=[*_MODEL, "outcome", "reason"],
        )
        families = {
            stage: _histogram(
                "narsil_request_seconds" if stage == "total" else f"narsil_request_{stage}_seconds",
                "Seconds of answered requests, " + ("arrival to answer." if stage == "total" else f"stage {stage}."),
                _MODEL,
            )
            for stage in (*STAGES, "total")
        }
        for (name, its, end), stages in self._observer.tally.ends().items():
            reason = "" if end == "answered" else end
            ends.add_metric([name, its, _OUTCOMES.get(end, "failed"), reason], stages["total"].count)
            for stage, family in families.items() if end == "answered" else ():
                _add(family, [name, its], stages[stage], SECONDS)
        yield ends
        yield from families.values()

    def _batches(self) -> Iterator[Metric]:
        requests = _histogram("narsil_batch_requests", "Requests of a batch.", _MODEL)
        rows = _histogram("narsil_batch_rows", "Rows of a batch, without padding.", _MODEL)
        busy = CounterMetricFamily(
            "narsil_lane_busy_seconds", "Seconds that a lane was busy with a model's batches.", labels=["lane", *_MODEL]
        )
        sums: dict[tuple[str, str], tuple[Distribution, Distribution]] = {}
        for (name, its, lane), (these, those, seconds) in self._observer.tally.batches().items():
            before = sums.get((name, its))
            sums[name, its] = (these, those) if before is None else (before[0] + these, before[1] + those)
            busy.add_metric([lane, name, its], seconds)
        for key, (these, those) in sums.items():
            _add(requests, key, these, BATCH_SIZES)
            _add(rows, key, those, BATCH_SIZES)
        yield from (requests, rows, busy)

    def _waiting(self) -> Iterator[Metric]:
        families = {
            what: GaugeMetricFamily(f"narsil_queue_{what}", f"{what.capitalize()} that wait now.", labels=_MODEL)
            for what in ("requests", "rows", "ids", "bytes")
        }
        for model, load in self._queues().items():
            for what, family in families.items():
                family.add_metric(model, load[what])
        yield from families.values()

    def _scores(self) -> Iterator[Metric]:
        labels = [*_MODEL, "task"]
        family = _histogram("narsil_score", "Scores of a sample of the answered requests.", labels)
        # A histogram with bounds below 0 has no sum of its own, since that could fall.
        count = CounterMetricFamily("narsil_scores_sampled", "Scores in the sample.", labels=labels)
        total = GaugeMetricFamily("narsil_score_running_sum", "Sum of the scores in the sample.", labels=labels)
        for key, found in self._observer.tally.scores().items():
            _add(family, key, found, SCORES)
            count.add_metric(key, found.count)
            total.add_metric(key, found.total)
        yield from (family, count, total)

    def _features(self) -> Iterator[Metric]:
        about = dict(zip(FEATURE_COUNTS, ("Bags", "Ids", "Empty bags", "Ids that are 0"), strict=True))
        families = [
            CounterMetricFamily(f"narsil_feature_{count}", f"{text} in a sample of rows.", labels=[*_MODEL, "feature"])
            for count, text in about.items()
        ]
        for (name, its), counts in self._observer.tally.features().items():
            names = self._feature_names(name, its)
            for family, row in zip(families, counts, strict=True):
                for feature, count in zip(names, row.tolist(), strict=False):
                    family.add_metric([name, its, feature], count)
        yield from families

    def _rare(self) -> Iterator[Metric]:
        refused = CounterMetricFamily(
            "narsil_refused_requests", "Requests that the engine never saw, by why.", labels=["method", "reason"]
        )
        for key, count in self._observer.refusals().items():
            refused.add_metric(key, count)
        lost = CounterMetricFamily(
            "narsil_undelivered_answers", "Answers that could not be written.", labels=["method"]
        )
        for method, count in self._observer.failures().items():
            lost.add_metric([method], count)
        passed = CounterMetricFamily(
            "narsil_passed_over_requests",
            "Requests with a group that their model does not take.",
            labels=[*_MODEL, "group"],
        )
        for group, count in self._observer.passed_over_counts().items():
            passed.add_metric(group, count)
        yield from (refused, lost, passed)

    def _kept_by_others(self) -> Iterator[Metric]:
        for owner, counts in self._observer.watched().items():
            for name, count in counts.items():
                kind = GaugeMetricFamily if name in _NOW else CounterMetricFamily
                yield kind(f"narsil_{owner}_{name}", f"{name.replace('_', ' ')}, as counted by: {owner}.", value=count)


def _histogram(name: str, about: str, labels: Sequence[str]) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, about, labels=labels)


def _add(family: HistogramMetricFamily, labels: Sequence[str], found: Distribution, bounds: Sequence[float]) -> None:
    below = found.counts.cumsum().tolist()
    names = [*(str(bound) for bound in bounds), "+Inf"]
    family.add_metric(labels, [*zip(names, below, strict=True)], found.total)
