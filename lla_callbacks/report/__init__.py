"""What every result shares: style, words, plain forms, files, loggers."""
