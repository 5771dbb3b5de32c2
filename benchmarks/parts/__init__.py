"""One short script per part of the algorithm: it shows that the part does its work, with numbers and a verdict."""
