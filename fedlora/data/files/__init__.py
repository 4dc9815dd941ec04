"""Files of rows -> fields of each row, with line numbers: JSON, CSV, Parquet, compressed or not. Needs no tokenizer."""
