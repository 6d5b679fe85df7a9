"""What measures: each table of the README beside this file has its command here. Skip it."""
