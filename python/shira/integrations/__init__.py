"""Adapters in other libraries. Each module imports the library that it is for, so import it where that is installed."""
