def write_study(folder, rows):
    pass
