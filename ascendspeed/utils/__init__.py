"""Errors, safe reading, atomic writing and progress: no dependency on the rest of the library."""
