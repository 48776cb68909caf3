"""Files and folders, as conversions read and write them. What uploads need of these, they take from here."""
