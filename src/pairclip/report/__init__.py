"""Checks, evaluations and searches as HTML pages: single files that load nothing."""

from pairclip.report.check_page import write_check_report
from pairclip.report.comparison_page import write_report
from pairclip.report.search_page import write_search_report

__all__ = ["write_check_report", "write_report", "write_search_report"]
