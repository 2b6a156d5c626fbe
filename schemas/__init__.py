"""The shape of everything that is stored: contract, tables, lake and sample months."""
