"""What is inside a packed checkpoint, as data and as a page."""

from moeq.inspection.inspection import Inspection
from moeq.inspection.page import render, write_page

__all__ = ["Inspection", "render", "write_page"]
