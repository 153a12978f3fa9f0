"""One page from result files: `records` reads them, `*_tables`, `figures` and `flags` show them, `page` and `plaintext` put them together."""
