"""What people start: the command line now, clusters and servers with their own issues."""

if __name__ != "mfdist.launch":
    raise ImportError("this folder is imported as mfdist.launch; `launch` alone may be another project's package")
