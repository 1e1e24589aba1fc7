"""Parts for other libraries' trainers, which let them keep adapters. Each module imports its library."""
