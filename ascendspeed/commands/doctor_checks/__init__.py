"""Checks of `intern doctor`: packages, devices, machine."""
