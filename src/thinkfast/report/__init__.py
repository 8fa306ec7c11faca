"""The report of a run: figures as files and one page that opens from disk."""

from thinkfast.report.page import write_report

__all__ = ["write_report"]
