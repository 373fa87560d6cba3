def main():
    raise SystemExit("kpcore demo: being written")
