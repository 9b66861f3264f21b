"""A run of which only the end is told."""

from sanctl.report.console import out
from sanctl.report.records import RunSummary
from sanctl.report.reporter import Reporter
from sanctl.report.terminal import describe_end


class QuietReporter(Reporter):
    """Prints how the run ended; the rest is in the run's folder."""

    def run_finished(self, summary: RunSummary) -> None:
        """Print the best epoch and where the run lies."""
        out.print(describe_end(summary))
