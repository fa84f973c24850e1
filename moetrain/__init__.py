"""moetrain: distributed Mixture-of-Experts training whose gradients do not depend on the parallel layout."""

__version__ = "0.1.0"
