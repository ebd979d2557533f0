"""Floor 8: pages for people."""

from partita.report.search_page import write_search_page

__all__ = ["write_search_page"]
