"""What people are told in words: of wrong keys of a file, and of events while work goes on."""
