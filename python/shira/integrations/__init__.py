"""What other libraries' trainers need to keep adapters. Each module imports its peer: import it where that is there."""
