"""Evaluations and searches as HTML pages: single files that load nothing."""

from pairclip.report.comparison import write_report
from pairclip.report.search import write_search_report

__all__ = ["write_report", "write_search_report"]
