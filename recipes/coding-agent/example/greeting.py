def greeting(name, loud=False):
    said = f"hello {name}"
    return said.upper() if loud else said
