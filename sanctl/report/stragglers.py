"""Which processes of a run hold the others up."""

from collections.abc import Sequence
from statistics import median_high, median_low

from sanctl.report.records import RankRecord

SLOW = "slow"
WAITS = "waits"
_SLOW_BELOW = 0.9  # of the median speed
_WAITS_ABOVE = 0.1  # of the time, more than the median


def find_stragglers(records: Sequence[RankRecord]) -> dict[int, str]:
    """Return the ranks that lag behind the others, and how.

    A rank is `slow` below 90 % of the median of images per second. Ranks that wait for each other
    at every step have the same speed, and then what tells is who waits for data: a rank `waits`
    where the share of its time spent so is more than 10 points above the median. Of an even number
    of ranks the better one in the middle counts, so that one of two can be told from the other.

    Args:
        records: All ranks of a run.
    """
    if len(records) < 2:
        return {}
    slow = _SLOW_BELOW * median_high(record.images_per_s for record in records)
    waits = _WAITS_ABOVE + median_low(record.data_wait for record in records)
    found = {record.rank: WAITS for record in records if record.data_wait > waits}
    return found | {record.rank: SLOW for record in records if record.images_per_s < slow}
