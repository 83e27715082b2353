"""Comparison of training runs: logs of any framework -> aligned curves -> metrics -> a verdict that anyone
can check.
"""
