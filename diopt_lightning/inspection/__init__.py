"""What was learned, to look at: in the terminal, as JSON, as a page and as a picture."""

from diopt_lightning.inspection.page import page
from diopt_lightning.inspection.picture import picture
from diopt_lightning.inspection.report import Choice, Report, TaskReport, load, select
from diopt_lightning.inspection.terminal import show

__all__ = ["Choice", "Report", "TaskReport", "load", "page", "picture", "select", "show"]
