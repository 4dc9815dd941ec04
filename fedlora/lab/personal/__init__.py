"""The arm ``personal``: what each site gains by joining, if it makes the result its own."""
