"""The rules: each is a pure function that returns a finding about a record, or None."""
