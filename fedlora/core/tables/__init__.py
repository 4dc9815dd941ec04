"""Tables that more than one kind of file has, or that no deployment reads."""
