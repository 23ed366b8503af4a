from .data import load_data as load_data
from .evaluation import evaluate_digits as evaluate_digits
from .report import digits_summary as digits_summary, write_digits_report as write_digits_report
from .training import check_digits_folder as check_digits_folder, train_digits as train_digits
