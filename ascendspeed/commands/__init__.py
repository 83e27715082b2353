"""Commands: `intern NAME`, and the scripts of the repository, which are fronts of these modules."""
