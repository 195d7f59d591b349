"""The command line: parser, class help and parser errors. The only package that joins everything."""
