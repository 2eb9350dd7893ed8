"""The paper's eight benchmarks: their questions and rules, and the tables over runs."""
