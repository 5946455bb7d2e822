"""Evidence to a page, and the page to files."""

from optuna_ohgw.report.blocks import markdown
from optuna_ohgw.report.page import Page
from optuna_ohgw.report.write import open_page, report_study, write_report

__all__ = ["Page", "markdown", "open_page", "report_study", "write_report"]
