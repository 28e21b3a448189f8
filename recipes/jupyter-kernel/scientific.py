"""What is imported before the snapshot, and what each copy does anew."""

import io
import os
import random

import matplotlib
import matplotlib.pyplot as plt
import numpy
import pandas
import scipy
import scipy.linalg
import scipy.optimize
import scipy.stats

# Names that are there without an import. In a kernel they are hidden from %who.
NAMES = {
    "matplotlib": matplotlib,
    "numpy": numpy,
    "np": numpy,
    "pandas": pandas,
    "pd": pandas,
    "plt": plt,
    "scipy": scipy,
}


def reseed():
    """From the kernel's generator, which each copy has for itself."""
    seed = os.urandom(32)
    random.seed(seed)
    # numpy's legacy generator takes 32-bit words.
    numpy.random.seed([int.from_bytes(seed[i : i + 4], "little") for i in range(0, len(seed), 4)])


def rehearse():
    """Does once what people do first: much of these packages is imported, or looked for, on its first use."""
    frame = pandas.DataFrame({"a": [1, 2, 3], "b": ["x", "y", "x"]})
    frame.groupby("b").a.sum()
    frame.to_html()
    frame.describe()
    repr(frame)
    scipy.optimize.minimize(lambda x: (x - 1) ** 2, 0.0)
    scipy.stats.norm.fit(numpy.arange(10.0))
    scipy.linalg.solve(numpy.eye(3), numpy.ones(3))
    figure, axes = plt.subplots()
    axes.plot([1, 2, 3])
    axes.set_title("rehearsed")
    figure.savefig(io.BytesIO(), format="png", bbox_inches="tight")
    plt.close(figure)
