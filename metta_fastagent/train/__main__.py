from metta_fastagent.train.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
