"""Who is measured: one file for each, with what it does in every benchmark it takes part in.

A library is imported where it is used, so that no row pays for another's imports.
"""
