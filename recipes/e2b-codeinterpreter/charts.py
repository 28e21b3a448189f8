"""What the code interpreter shows beside a picture and a table: the chart's numbers, and the table's columns."""

import pandas
from e2b_charts import chart_figure_to_chart
from IPython.core.formatters import BaseFormatter
from matplotlib.figure import Figure
from traitlets import ObjectName, Unicode

CHART = "e2b/chart"
DATA = "e2b/data"


class ChartFormatter(BaseFormatter):
    format_type = Unicode(CHART)
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict


class DataFormatter(BaseFormatter):
    format_type = Unicode(DATA)
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = dict


def chart(figure):
    """The numbers of a figure; nothing where it is of no kind that is known."""
    try:
        found = chart_figure_to_chart(figure)
        return found and found.model_dump(mode="json")
    except Exception:
        # The picture is there all the same.
        return None


def columns(frame):
    return {str(name): frame.iloc[:, at].tolist() for at, name in enumerate(frame.columns)}


def register(display):
    """Has a shell's display formatter make both."""
    for kind, printer, printed in ((ChartFormatter, chart, Figure), (DataFormatter, columns, pandas.DataFrame)):
        formatter = kind(parent=display)
        formatter.for_type(printed, printer)
        display.formatters[formatter.format_type] = formatter
        display.active_types = [*display.active_types, formatter.format_type]
